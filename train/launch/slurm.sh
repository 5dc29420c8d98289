#!/bin/bash
# Several machines under SLURM:   sbatch train/launch/slurm.sh RECIPE --run.batch 128 --placement.checkpointing student
#
# Once on each machine, accelerate starts a process for each card. --out must lie where all machines can write. A job
# that is requeued goes on from its last checkpoint: it is the same command. SIGTERM before the time is up lets the step
# under way end and saves.
#SBATCH --job-name=stepdistill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=%x-%j.log
set -euo pipefail

recipe=${1:?name a recipe}
shift
here=${SLURM_SUBMIT_DIR:-$PWD}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
cards=${SLURM_GPUS_ON_NODE:-8}
export first cards here recipe

# the machine's own number is known on that machine only, hence the inner shell
srun --kill-on-bad-exit=1 bash -c '
  exec accelerate launch --config_file "$here/train/launch/nodes.yaml" \
    --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * cards)) \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$first" \
    -m stepdistill distill "$recipe" --out "$here/runs/$recipe" --run.device cuda --run.dtype bfloat16 "$@"
' launch "$@"
