#!/usr/bin/env bash
# The supervisor of one node of a job: bash FILE NODE JOB. Written by `python -m launch`; see docs/launch.md.
set -euo pipefail

# From the job file.
run=/home/me/stack/runs/vit_b16
launch=$run/launch
python=python3
nodes=node1,node2
in_container=()

node=$1 job=$2
cd -- /home/me/stack

# Setup from the job file; without -u, for activation scripts read unset variables.
set +u
source .venv/bin/activate
set -u

export NCCL_DEBUG=WARN
export OMP_NUM_THREADS=8

export PYTHONPATH=$launch/code${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 # the code as it was at submission
export PYTHONUNBUFFERED=1 # the last lines of what is killed are in its log

exec "${in_container[@]}" "$python" -m launch agent "$launch/job.json" --nodes "$nodes" \
  --node "$node" --job "$job" </dev/null
