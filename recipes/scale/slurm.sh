#!/bin/bash
# Trains on four machines of eight GPUs each: sbatch recipes/scale/slurm.sh
# The run folder must be on a disk that all machines see. After a failure, or when the time is over, submit it again: it
# goes on where it was.
#SBATCH --job-name=fxsplit
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# A minute before the end of the time, so that the run ends with a checkpoint.
#SBATCH --signal=TERM@60

set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node 8 \
    --max-restarts 3 \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$head:29500" \
    -m fxsplit train -c recipes/scale/imagenet.yaml --experiment imagenet-resnet50 --resume auto
