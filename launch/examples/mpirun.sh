#!/usr/bin/env bash
# Four ranks on the two nodes of a hostfile, by Open MPI's mpirun itself (4 or 5). The same as
#     allreel launch -n 4 --threads 8 --hostfile launch/examples/hostfile -- train CONFIG
# which also prefixes each line with its rank, names a rank that died, and lets ranks save on
# Ctrl-C: mpirun on its own gives them a second at most.
#
#     launch/examples/mpirun.sh my.toml [--resume] [--set section.key=value]...
set -euo pipefail

hostfile=${HOSTFILE:-$(dirname "${BASH_SOURCE[0]}")/hostfile}
ranks=${RANKS:-4}
# Ranks per node times threads should be the cores of a node.
threads=${THREADS:-8}
allreel=${ALLREEL:-$PWD/target/release/allreel}

export RAYON_NUM_THREADS=$threads
# PE=T binds each rank to T cores of its own. -x hands a variable on to the other nodes, which
# see nothing else of this environment.
exec mpirun -n "$ranks" --hostfile "$hostfile" \
    --map-by "slot:PE=$threads" --bind-to core \
    -x RAYON_NUM_THREADS \
    "$allreel" train "$@"
