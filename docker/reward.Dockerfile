# Reward server; runs on CPU, and on GPUs with a CUDA build of torch.
#
#     docker build --file docker/reward.Dockerfile --tag steersman/reward:0.1.0 .
ARG BASE_IMAGE=debian:bookworm-slim

FROM ${BASE_IMAGE} AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/steersman
ENV PATH=/opt/steersman/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=/src/constraints.txt
WORKDIR /src
COPY constraints.txt ./
# The default index serves CUDA builds; an index of CPU builds makes the image some 5 GB smaller.
ARG TORCH_INDEX_URL=
RUN pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch numpy
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY services services
COPY trainer trainer
RUN pip install ".[scoring]"

FROM ${BASE_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="steersman-reward" \
      org.opencontainers.image.description="Steersman reward server" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 steersman \
    && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin steersman
COPY --from=build /opt/steersman /opt/steersman
# Nothing is written outside volumes: caches of libraries go to HOME, and no module comes from the working directory.
ENV PATH=/opt/steersman/bin:$PATH HOME=/tmp PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /tmp
USER 10001:10001
EXPOSE 50053 9053 8053 8081
# tini passes signals on while a model loads, when Python as process 1 would not hear them, and reaps orphans.
ENTRYPOINT ["tini", "--", "python", "-m", "steersman.reward"]
