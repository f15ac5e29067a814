# What your cluster needs before Python starts. This is the one place for it: every script of this folder sources it.
#module load cuda/12.8
#source "$HOME/miniforge3/bin/activate" hfscale
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi    # made by launch/quickstart.sh
PYTHON=${HFSCALE_PYTHON:-python}      # `--launcher slurm` hands on the Python that it was run with

CONTAINER=()                          # what stands between srun's options and python, one of:
#CONTAINER=(--container-image=/shared/hfscale.sqsh --container-mounts=/shared --container-workdir="$PWD")    # pyxis and enroot
#CONTAINER=(apptainer exec --nv --bind /shared /shared/hfscale.sif)

export HF_HUB_OFFLINE=1               # nodes seldom reach the hub; what is needed is fetched before submission
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}    # a lost peer ends the ranks instead of hanging them
#export NCCL_SOCKET_IFNAME=ib0 NCCL_DEBUG=WARN
#export TORCH_EXTENSIONS_DIR=/scratch/torch_extensions    # where DeepSpeed's compiled kernels are kept: a disk of the node
