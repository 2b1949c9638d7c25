# The server, `skfac serve`, for CPUs or CUDA; docs/kubernetes.md says how to build it.
#
#   TORCH     the build of torch: 2.13.0+cpu, 2.13.0+cu130, ... A registry that has no such
#           build fails the build of the image; PIP_EXTRA_INDEX_URL names one that has.
#   PACKAGES  further packages: "ray[default]" for the image of deploy/ray.
#   BASE      pin it by digest in production: python:3.11-slim-bookworm@sha256:...
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG TORCH=2.13.0+cpu
ARG PACKAGES=
# pip's own variables, for a mirror or a folder of wheels.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_NO_INDEX
ARG PIP_FIND_LINKS
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /build && python -m venv --without-pip /opt/skfac
COPY requirements/dev.lock requirements/
RUN /build/bin/pip --python /opt/skfac/bin/python install -c requirements/dev.lock \
      "torch==${TORCH}"
COPY pyproject.toml README.md LICENSE ./
COPY proto proto
COPY service service
COPY client client
# What only compiles C++ against torch, or tests it, is a tenth of the image.
RUN /build/bin/pip --python /opt/skfac/bin/python install -c requirements/dev.lock \
      . "torch==${TORCH}" ${PACKAGES:+"${PACKAGES}"} \
    && for part in include share test; do \
         rm -rf /opt/skfac/lib/python3*/site-packages/torch/$part; \
       done

FROM ${BASE}
LABEL org.opencontainers.image.title="skfac" \
      org.opencontainers.image.description="SKFAC preconditioning as a service" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 skfac \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp skfac
COPY --from=build /opt/skfac /opt/skfac
COPY deploy/image/skfac.toml /etc/skfac/skfac.toml
ENV PATH=/opt/skfac/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp
USER 10001:10001
# gRPC, health, metrics
EXPOSE 50051 50052 9464
HEALTHCHECK --interval=10s --timeout=8s --start-period=60s \
  CMD ["python", "-m", "skfac.service.probe", "127.0.0.1:50052", "ready"]
ENTRYPOINT ["skfac"]
CMD ["serve", "--config", "/etc/skfac/skfac.toml"]
