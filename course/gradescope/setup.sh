#!/usr/bin/env bash
# Gradescope runs this once, as root. It needs Python 3.11 or newer: choose Ubuntu 24.04.
set -eu
apt-get update
apt-get install -y python3-venv
python3 -m venv /autograder/venv
cd /autograder/source
/autograder/venv/bin/pip install --index-url https://download.pytorch.org/whl/cpu \
    $(grep -E '^torch(audio)?==' requirements.txt)
/autograder/venv/bin/pip install -r requirements.txt
