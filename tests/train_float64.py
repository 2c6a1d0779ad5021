"""train.py in double precision, to compare runs exactly. It takes the same command line."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from analysis.bench import to_float64
from plumbing.files import readable_errors

if __name__ == "__main__":
    usual = train.start_model
    train.start_model = lambda config, device: to_float64(usual(config, device))
    try:
        with readable_errors():
            train.main()
    finally:
        train.start_model = usual
