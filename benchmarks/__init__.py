"""The paper's seven benchmarks: their files and scorers, and how they are asked."""
