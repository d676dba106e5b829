#!/usr/bin/env bash
# What needs several GPUs, in one go, within ten minutes: one rank a GPU over NCCL is killed and recovers in place; the
# transcript's cost; overhead and recoveries measured. Writes as it goes.
# Usage: scripts/bench/on_several_gpus.sh RESULTS_DIRECTORY
set -uo pipefail
cd "$(dirname "$0")/../.."
results=$1
export PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
python3 setup.py build_ext --inplace >"$results/build.log" 2>&1 || { tail -30 "$results/build.log"; exit 1; }
python3 -c "import moevement_ext; print(moevement_ext.build_info())"
timeout 200 python3 -m pytest -m gpu tests/gpu/test_local_recovery.py -q -s -p no:cacheprovider -k nccl >"$results/nccl.log" 2>&1
tail -25 "$results/nccl.log" | cut -c1-600
timeout 100 python3 -m pytest -m gpu tests/gpu/test_boundary.py -q -s -p no:cacheprovider >"$results/boundary.log" 2>&1
tail -12 "$results/boundary.log" | cut -c1-600
timeout 120 python3 -m pytest -m gpu tests/gpu/test_local_recovery.py -q -s -p no:cacheprovider -k gloo >"$results/gloo.log" 2>&1
tail -12 "$results/gloo.log" | cut -c1-600
exit 0
