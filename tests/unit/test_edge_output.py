"""What an export shows while it goes on."""

from __future__ import annotations

from threading import Event

from lightning_prune.callbacks._edge_output import still_at_work


def test_long_work_is_told_of_until_it_ends():
    texts, said = [], Event()

    def tell(text):
        texts.append(text)
        said.set()

    with still_at_work(tell, "exporting", every=0.01):
        assert said.wait(60)
    count = len(texts)
    assert texts[0].startswith("exporting (")
    assert texts[0].endswith("s so far)")
    with still_at_work(tell, "exporting", every=60):
        pass
    assert len(texts) == count, "short work is not worth a word"
