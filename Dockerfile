# minitron_mcore for GPU clusters.
#
#   docker build -t minitron .
#   docker run --rm --gpus all --ipc host -v /data:/data minitron distill --config /data/recipe.yaml
#
# The default base brings torch, Transformer Engine and Apex, compiled against each other: pip must not replace them. It
# is the newest whose torch is in pyproject.toml's range: 2.13, with Python 3.12 and CUDA 13.3; from 26.08 on it is 2.14.
# Another base works too; with one that has no Transformer Engine, such as nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04,
# pip installs torch and builds it. For a CPU image: --build-arg BASE_IMAGE=python:3.12-slim --build-arg EXTRAS=
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.07-py3
FROM ${BASE_IMAGE}
ARG EXTRAS=gpu

# A plain CUDA image has no Python. PEP 668 marks Debian's Python as not pip's to change; in an image it is.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN command -v pip || \
    (apt-get update && apt-get install -y --no-install-recommends g++ python3-dev python3-pip python-is-python3 && \
     rm -rf /var/lib/apt/lists/*)

# The image's own list (/etc/pip/constraint.txt) fixes every package it holds, some below what the package needs. This
# one fixes what is compiled against torch or CUDA, at the versions found, for this build and for whoever installs on
# top; it is empty on a bare image.
ENV PIP_CONSTRAINT=/etc/minitron-constraints.txt
RUN PIP_CONSTRAINT= pip list --format=freeze \
    | grep -iE '^(torch|torchvision|triton|pytorch[-_]triton|transformer[-_]engine.*|apex|flash[-_]attn|numpy)==' \
    > /etc/minitron-constraints.txt || true

# torch first: Transformer Engine is built against it, hence no build isolation. In editable form, so that the launch
# scripts and recipes beside the package are at hand and the code exists once.
WORKDIR /opt/minitron
COPY . .
RUN pip install 'setuptools>=77' wheel && pip install 'torch>=2.8,<2.14' && \
    pip install --no-build-isolation --editable ".${EXTRAS:+[$EXTRAS]}"

ENTRYPOINT ["minitron"]
CMD ["--help"]
