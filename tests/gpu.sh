#!/usr/bin/env bash
# What only a GPU can show, in at most ten minutes: correctness, time and memory.
#
#     bash tests/gpu.sh 2>&1 | tee gpu.txt
#
# It needs 24 GB on the card, 15 GB of memory, 10 GB of disk, and no network. Without a card,
# BENCH="--size shapes --rounds 1" tries the script itself: what needs one is skipped.

cd "$(dirname "$0")/.." || exit
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || echo "no card"
git log -1 --format="commit %h"
python -c 'import torch; print("torch", torch.__version__)'
status=0

# 1. The tests that take a card where there is one
timeout 120 python -m pytest -q tests/test_gpu.py || status=1

# 2. A step at full depth, in bfloat16, against the naive one's
timeout 200 python -m analysis.bench ${BENCH:---layers 1} || status=1

# 3. InternVL2-1B's true shapes in both stages, and two processes on one card
timeout 280 python -m pytest -q -s -m slow tests/test_gpu.py || status=1
exit $status
