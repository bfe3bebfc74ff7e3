#!/bin/sh
# Set up an aarch64 Python with numpy and onnxruntime under user-mode emulation, to run bundles on:
#
#     tests/aarch64.sh DIRECTORY
#     LIGHTNING_PRUNE_AARCH64=DIRECTORY/python pytest -m slow tests/integration/test_aarch64.py
#
# On Debian and its kin, without root and without a change to the system: packages come from the archive and pip
# index that this machine is configured for, and are only unpacked. It takes 700 MB. The emulator is of Debian 13,
# because that of Debian 12 crashes in onnxruntime. Emulated times mean nothing; outputs do.
set -eu

suite=${SUITE:-trixie}
target=$(mkdir -p "$1" && cd "$1" && pwd)
root=$target/root
mkdir -p "$target/apt/lists/partial" "$target/apt/archives/partial" "$root"
: > "$target/apt/status"

# The archive this system was installed from, and Debian's keys
uri=$(apt-get indextargets --format '$(ORIGIN) $(REPO_URI)' 'Created-By: Packages' |
    grep '^Debian ' | grep -v security | sort -u | head -n 1 | cut -d ' ' -f 2)
keys=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb [signed-by=$keys] $uri $suite main" > "$target/apt/sources.list"

# apt for one architecture, with a state of its own in which nothing is installed
apt_for() {
    architecture=$1
    shift
    apt-get -qq -o Debug::NoLocking=1 \
        -o Dir::State="$target/apt" -o Dir::State::status="$target/apt/status" \
        -o Dir::Cache="$target/apt" -o Dir::Etc::sourcelist="$target/apt/sources.list" \
        -o Dir::Etc::sourceparts=- -o APT::Architecture="$architecture" \
        -o APT::Architectures="$architecture" -o APT::Install-Recommends=0 "$@"
}

unpack() { # the packages that were fetched, into a directory
    for package in "$target"/apt/archives/*.deb; do
        dpkg-deb --extract "$package" "$1"
        rm "$package"
    done
}

apt_for "$(dpkg --print-architecture)" update
apt_for "$(dpkg --print-architecture)" --yes --download-only install qemu-user
unpack "$target/host"
apt_for arm64 update
apt_for arm64 --yes --download-only install base-files python3-minimal libpython3-stdlib libstdc++6
unpack "$root"

program=$(ls "$root"/usr/bin/python3.* | head -n 1)
version=${program##*python3.}
python3 -m pip install --quiet --target "$target/packages" --only-binary=:all: --python-version "3.$version" \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 \
    --platform manylinux2014_aarch64 numpy onnxruntime

cat > "$target/python" <<END
#!/bin/sh
export PYTHONHOME="$root/usr" PYTHONPATH="$target/packages" PYTHONDONTWRITEBYTECODE=1
exec "$target/host/usr/bin/qemu-aarch64" -L "$root" "$program" "\$@"
END
chmod +x "$target/python"
"$target/python" -c 'import platform, onnxruntime; print(platform.machine(), onnxruntime.__version__)'
