#!/usr/bin/env bash
# What makes numbers, with the lowest versions that setup.cfg allows, in an environment of its own:   bash tests/lowest.sh
# A version that ignores an option gives wrong numbers without a word, so both ends of every range are run.
#   HFSCALE_LOWEST=DIR     make or use the environment there instead of .lowest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
prefix=${HFSCALE_LOWEST:-$PWD/.lowest}
torch=$(grep '^torch==' constraints.txt)
if [ ! -x "$prefix/bin/pytest" ]; then
    python3 -m venv "$prefix"
    DS_BUILD_OPS=0 "$prefix/bin/python" -m pip install --quiet --disable-pip-version-check -c tests/lowest.txt "$torch" \
        -e . hypothesis psutil pytest pytest-xdist
fi
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=$PWD
exec "$prefix/bin/python" -m pytest -n 2 --dist loadfile -m "not slow" -p no:cacheprovider \
    tests/config tests/engine tests/models tests/objectives tests/stream tests/tasks "$@"
