#!/usr/bin/env bash
# Four ranks on two nodes under Slurm:
#     sbatch launch/examples/sbatch.sh my.toml
# `srun --mpi=list` shows which plugins the cluster has. pmix is the one for Open MPI; for MPICH
# write pmi2.
#SBATCH --job-name=allreel
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=allreel-%j.log
# Two minutes before the time is up the ranks get SIGTERM, and save.
#SBATCH --signal=TERM@120
# Submit again after a crash of a node; --resume below then continues from the last checkpoint.
#SBATCH --requeue
set -euo pipefail

config=${1:?usage: sbatch sbatch.sh CONFIG.toml [--set section.key=value]...}
shift
allreel=${ALLREEL:-$SLURM_SUBMIT_DIR/target/release/allreel}

export RAYON_NUM_THREADS=$SLURM_CPUS_PER_TASK
# --cpus-per-task again, because srun does not take it from sbatch (since Slurm 22.05).
# --kill-on-bad-exit: without it the other ranks wait for a dead one until the time is up.
# --label prefixes each line with its rank.
resume=()
((${SLURM_RESTART_COUNT:-0} > 0)) && resume=(--resume)
exec srun --mpi=pmix --cpus-per-task="$SLURM_CPUS_PER_TASK" --cpu-bind=cores \
    --kill-on-bad-exit=1 --label \
    "$allreel" train "$config" "${resume[@]}" "$@"
