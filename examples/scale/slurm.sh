#!/bin/bash
# Narrow a model on several nodes. Before the time limit, and after the failure of a node, the job
# is queued again; it goes on from the last state in $OUT.unfinished. See docs/scale.md.
#
#   sbatch --nodes 8 examples/scale/slurm.sh /shared/models/Llama-3.1-8B python /shared/runs/8b
#
# More arguments go to `llm-narrow prune` as they are, and win over those below.
#SBATCH --job-name=llm-narrow
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@120

set -euo pipefail

if [ $# -lt 3 ]; then
  echo "usage: sbatch slurm.sh MODEL DOMAIN OUT [flags of llm-narrow prune]" >&2
  exit 2
fi
model=$1 domain=$2 out=$3
shift 3

if [ -e "$out/manifest.json" ]; then # queued again after its last second
  echo "$out is finished."
  exit 0
fi

gpus=${SLURM_GPUS_ON_NODE:-8}
nodes=${SLURM_NNODES:-1}
# One step is to see as many tokens however many GPUs there are: 256 blocks of 2,048.
accumulation=$((256 / (4 * gpus * nodes)))
[ "$accumulation" -ge 1 ] || accumulation=1

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
export PYTHONUNBUFFERED=1

again() {
  echo "Time is nearly up: job $SLURM_JOB_ID is queued again, after ${SLURM_RESTART_COUNT:-0} times."
  # Slurm ends the job with that. What was trained since the last state will be repeated.
  scontrol requeue "$SLURM_JOB_ID" || echo "It could not be: queue it by hand." >&2
  wait "$step"
}
trap again USR1

# An error of the command itself ends the job: it would come again. torchrun's exit code does not
# tell what the error was; the log does.
srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$nodes" --nproc-per-node "$gpus" --max-restarts 0 \
  --rdzv-backend c10d --rdzv-endpoint "${hosts[0]}:$port" \
  --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
  -m llm_narrow prune --model "$model" --domain "$domain" --out "$out" \
  --sparsity 0.5 --recover-tokens 1B --distill cached \
  --length 2048 --batch-size 4 --accumulation "$accumulation" --checkpointing --sharded \
  --calibration-tokens 262144 --save-every-minutes 10 --no-speed "$@" &
step=$!
wait "$step" # in the background, so that the trap runs at once
