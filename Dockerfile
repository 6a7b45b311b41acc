# minitron_mcore for GPU clusters, or for a CPU.
#
#   docker build -t minitron .                                  # --build-arg DEVICE=cpu: a small image without CUDA
#   docker run --rm --network none --entrypoint launch/smoke.sh minitron    # whether it works: a minute
#   docker run --rm --gpus all --ipc host -v /data:/data minitron distill --config /data/recipe.yaml
#
# The GPU image's base brings torch, Transformer Engine and Apex, compiled against each other, which pip must not replace.
# It is the newest whose torch is in pyproject.toml's range: 2.13, with Python 3.12 and CUDA 13.3; from 26.08 on it is
# 2.14. Nothing here reaches for a network at run time unless it is asked to: a recipe's log.wandb, HF_HUB_OFFLINE=0.
# There is no HEALTHCHECK, since a container runs one job and ends with it; the job has a watchdog of its own.
ARG DEVICE=gpu
ARG GPU_IMAGE=nvcr.io/nvidia/pytorch:26.07-py3
ARG CPU_IMAGE=python:3.12.12-slim-bookworm

FROM ${GPU_IMAGE} AS gpu
ENV EXTRAS=[gpu]

FROM ${CPU_IMAGE} AS cpu
# torch.compile wants a C++ compiler. Debian keeps no older versions of it that could be named here.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
ENV EXTRAS=

FROM ${DEVICE}
ARG DEVICE
# Where torch for a CPU comes from; empty: pip's own index, whose builds bring CUDA's libraries.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
SHELL ["/bin/bash", "-e", "-u", "-o", "pipefail", "-c"]
# PEP 668 marks the Python of Ubuntu as not pip's to change; in an image it is.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /opt/minitron

# The versions that are tested; but what the base holds compiled against torch or CUDA stays as found, for this build and
# for whoever installs on top. (The base's own list fixes every package it holds, some below what is needed here.)
COPY constraints.txt ./
ENV PIP_CONSTRAINT=/opt/minitron/constraints.image.txt
RUN compiled='torch|torchvision|triton|pytorch[-_]triton|transformer[-_]engine.*|apex|flash[-_]attn|numpy'; \
    found=$(pip list --format=freeze | grep -iE "^($compiled)==" || true); \
    names=$(echo "$found" | sed 's/==.*//; s/[-_]/[-_]/g' | paste -sd '|'); \
    { grep -viE "^($names)==" constraints.txt; echo "$found"; } > constraints.image.txt

# What the package needs, in a layer that only a change of these files makes anew: the package is empty so far.
COPY pyproject.toml ./
# The versions are PIP_CONSTRAINT's.
# hadolint ignore=DL3013
RUN mkdir -p minitron_mcore && touch README.md LICENSE && echo '__version__ = "0"' > minitron_mcore/__init__.py; \
    pip install --no-cache-dir --upgrade setuptools; \
    [ "$DEVICE" != cpu ] || pip install --no-cache-dir --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch; \
    pip install --no-cache-dir --no-build-isolation --editable ".$EXTRAS"; \
    [ "$DEVICE" != cpu ] || pip check

# In editable form, so that recipes and launch scripts beside the package are at hand and the code exists once.
COPY . .
RUN pip install --no-cache-dir --no-build-isolation --no-deps --editable . && python -m compileall -q minitron_mcore

# Not root. Whoever it is run as instead (--user, pyxis) has a name, too, and a home for what libraries write there.
RUN useradd --uid 10001 --create-home minitron && chmod 1777 /home/minitron
ENV HOME=/home/minitron USER=minitron HF_HUB_OFFLINE=1
USER 10001

ENTRYPOINT ["minitron"]
CMD ["--help"]
