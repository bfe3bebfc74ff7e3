"""Lightning callbacks: when things happen, their state, and what is logged; no algorithm."""
