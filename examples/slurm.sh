#!/bin/bash
# Train ConViT-B+ on eight machines with eight GPUs each: IMAGENET=/data/tfds sbatch examples/slurm.sh (docs/clusters.md).
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120     # saves two minutes before the end
#SBATCH --requeue
# srun needs --cpus-per-task again since Slurm 22.05.
srun --cpus-per-task=$SLURM_CPUS_PER_TASK --kill-on-bad-exit=1 \
    .venv/bin/python train.py --config=configs/convit_b_plus.py --config.batch_size=4096 \
    --config.data.dir="$IMAGENET" --config.data.workers=10 --workdir=runs/b_plus
