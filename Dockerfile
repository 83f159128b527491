# The trainers as images: --target cpu, gpu or tensorboard. launch/image.sh builds one from a commit.
# Pin the base by digest where it matters: --build-arg BASE_IMAGE=python:3.11-slim-bookworm@sha256:…
ARG BASE_IMAGE=python:3.11-slim-bookworm

# ---- builders: a virtual environment from a hash lock, and a bill of what it holds (/opt/venv/sbom.cdx.json) ---------
FROM ${BASE_IMAGE} AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
RUN python -m venv /opt/venv && python -m venv /opt/sbom
COPY requirements/build.txt requirements/sbom.txt ./
# Optional secrets: a site's pip configuration and certificates; not given, they have no effect. Nothing of them stays.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca.crt,target=/etc/ssl/pip-ca.crt,required=false \
    /opt/venv/bin/pip install --require-hashes --no-deps --only-binary=:all: -r build.txt && \
    /opt/sbom/bin/pip install --require-hashes --no-deps --only-binary=:all: -r sbom.txt

FROM builder AS builder-cpu
COPY requirements/cpu.txt requirements/storage.txt requirements/metrics.txt ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca.crt,target=/etc/ssl/pip-ca.crt,required=false \
    /opt/venv/bin/pip install --require-hashes --no-deps --no-build-isolation --only-binary=:all: \
      --no-binary=promise -r cpu.txt -r storage.txt -r metrics.txt
# What else is wanted, for --tracker: --build-arg EXTRAS="mlflow wandb".
ARG EXTRAS=""
COPY requirements/mlflow.txt requirements/wandb.txt ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca.crt,target=/etc/ssl/pip-ca.crt,required=false \
    for extra in $EXTRAS; do \
      /opt/venv/bin/pip install --require-hashes --no-deps --only-binary=:all: -r "$extra.txt" || exit 1; \
    done && /opt/venv/bin/pip check && \
    /opt/sbom/bin/cyclonedx-py environment --output-file /opt/venv/sbom.cdx.json /opt/venv

FROM builder AS builder-gpu
COPY requirements/gpu.txt requirements/storage.txt requirements/metrics.txt ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca.crt,target=/etc/ssl/pip-ca.crt,required=false \
    /opt/venv/bin/pip install --require-hashes --no-deps --no-build-isolation --only-binary=:all: \
      --no-binary=promise -r gpu.txt -r storage.txt -r metrics.txt
ARG EXTRAS=""
COPY requirements/mlflow.txt requirements/wandb.txt ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca.crt,target=/etc/ssl/pip-ca.crt,required=false \
    for extra in $EXTRAS; do \
      /opt/venv/bin/pip install --require-hashes --no-deps --only-binary=:all: -r "$extra.txt" || exit 1; \
    done && /opt/venv/bin/pip check && \
    /opt/sbom/bin/cyclonedx-py environment --output-file /opt/venv/sbom.cdx.json /opt/venv

FROM builder AS builder-tensorboard
COPY requirements/tensorboard.txt ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca.crt,target=/etc/ssl/pip-ca.crt,required=false \
    /opt/venv/bin/pip install --require-hashes --no-deps --only-binary=:all: -r tensorboard.txt && \
    /opt/venv/bin/pip check && \
    /opt/sbom/bin/cyclonedx-py environment --output-file /opt/venv/sbom.cdx.json /opt/venv

# ---- the code: one layer, the same for each build of a commit --------------------------------------------------------
FROM scratch AS code
COPY COMMIT* /app/
COPY models /app/models
COPY trainers /app/trainers

# ---- what the final stages share: a user with a fixed id, and the labels of the commit -------------------------------
FROM ${BASE_IMAGE} AS final
RUN groupadd --gid 10001 lockstep && \
    useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin lockstep && \
    install -d -m 1777 /work
# The root file system may be read-only: what is written goes to /work (a volume) and /tmp.
ENV HOME=/tmp PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 NVIDIA_DRIVER_CAPABILITIES=compute,utility
# launch/image.sh adds the version and the commit; the trainer reads the latter from /app/COMMIT.
LABEL org.opencontainers.image.title="lockstep" \
      org.opencontainers.image.licenses="Apache-2.0"
WORKDIR /work
USER 10001:10001
# No HEALTHCHECK: a trainer is a batch job, its exit code and --step_timeout say how it is.

FROM final AS tensorboard
COPY --from=builder-tensorboard /opt/venv /opt/venv
# What is in it, and of which commit: podman would give an image that is all in its cache the labels of an older build.
COPY requirements/tensorboard.txt COMMIT* /app/
EXPOSE 6006
# In a container loopback reaches nobody: publish the port on the host's loopback alone, -p 127.0.0.1:6006:6006.
ENTRYPOINT ["tensorboard", "--host=0.0.0.0", "--port=6006", "--logdir=/work"]

FROM final AS gpu
COPY --from=builder-gpu /opt/venv /opt/venv
COPY --from=code /app /app
ENTRYPOINT ["python", "/app/trainers/custom_loop.py"]

FROM final AS cpu
COPY --from=builder-cpu /opt/venv /opt/venv
COPY --from=code /app /app
ENTRYPOINT ["python", "/app/trainers/custom_loop.py"]
