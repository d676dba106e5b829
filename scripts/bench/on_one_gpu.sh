#!/usr/bin/env bash
# Everything that is measured on one GPU, in one go: builds the extension, tests the main job, measures the overhead.
# Usage: scripts/bench/on_one_gpu.sh RESULTS_DIRECTORY
set -uo pipefail
cd "$(dirname "$0")/../.."
results=$1
export PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
python3 setup.py build_ext --inplace >"$results/build.log" 2>&1 || { tail -30 "$results/build.log"; exit 1; }
python3 -c "import moevement_ext; print(moevement_ext.build_info())"
timeout 150 python3 scripts/bench/overhead.py --model 16-experts --window 4 --blocks 6 --output "$results/overhead_16_experts_w4" \
  2>"$results/w4.log" || tail -15 "$results/w4.log"
timeout 220 python3 -m pytest -m gpu tests/gpu -q -p no:cacheprovider -x 2>&1 | tail -45
timeout 150 python3 scripts/bench/overhead.py --model 16-experts --window auto --output "$results/overhead_16_experts_auto" \
  2>"$results/auto.log" || tail -15 "$results/auto.log"
timeout 240 make -C csrc -j8 test-cuda 2>&1 | grep -v "^g++" | tail -40
exit 0
