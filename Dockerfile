# A CPU image of the training script. For GPUs, choose a base with the CUDA toolkit, so that the CUDA copy engine is
# built, and with Python 3.11 or 3.12 and pip on its path, for instance a PyTorch `-devel` image:
#   docker build --build-arg BASE=pytorch/pytorch:<version>-cuda<version>-cudnn9-devel -t moevement .
#   docker run --gpus all --ipc=host moevement --num-layers 4 ...
# Slots lie in /dev/shm, which docker limits to 64 MB: give `--ipc=host` or a large enough `--shm-size`.
ARG BASE=python:3.11-slim
FROM ${BASE}

RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/moevement

# Before the sources, so that a change to the code doesn't install torch again.
COPY requirements.txt ./
RUN python -m pip install --no-cache-dir -r requirements.txt

COPY . .
RUN python -m pip install --no-cache-dir --no-build-isolation --no-deps -e .

ENV OMP_NUM_THREADS=1
ENTRYPOINT ["python", "pretrain_gpt.py"]
CMD ["--help"]
