# Every script of this folder begins with it: what the site needs, and what must hold whatever that is.
# sbatch hands on the variables of whoever submits: in another job, or after one in the same process, each rank would take itself for that one's
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
set +eu                               # conda and modules read variables that are not set
source slurm/site.sh
set -euo pipefail
if [ "$(ulimit -f)" = 0 ]; then exit 153; fi    # no file may grow, not even the log that would say so: the code of SIGXFSZ does
if [ ${#CONTAINER[@]} -gt 0 ]; then
    if [ "$PYTHON" = "${HFSCALE_PYTHON:-}" ]; then PYTHON=python; fi    # the login node's Python is not the image's
elif ! command -v "$PYTHON" > /dev/null; then
    echo "error: there is no Python '$PYTHON' on $(hostname): activate an environment in slurm/site.sh" >&2
    exit 2
fi
SRUN=(srun --mpi=none)                # ranks need no MPI, and the site's default may not work
if [ "${ENVIRONMENT:-}" != BATCH ]; then SRUN+=(--overlap); fi    # a shell of `srun --pty` holds what the ranks need
