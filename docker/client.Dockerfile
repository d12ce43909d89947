# The `steersman` command and the Python client: no torch, and no Kubernetes client, which would make it half as large again
# (`steersman train --on kubernetes` is for where a kubeconfig is).
#
#     docker build --file docker/client.Dockerfile --tag steersman/client:0.1.0 .
ARG BASE_IMAGE=debian:bookworm-slim

FROM ${BASE_IMAGE} AS build
# pip stands beside the environment, so that it is not in the image. Its configuration, if it needs one, is the secret `pip`;
# the certificate authorities that this names, if not the public ones, the secret `ca` (/run/secrets/ca).
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/pip \
    && python3 -m venv --without-pip /opt/steersman
ENV PATH=/opt/pip/bin:$PATH PIP_PYTHON=/opt/steersman/bin/python PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore PIP_CONFIG_FILE=/run/secrets/pip PIP_CONSTRAINT=/src/constraints.txt
WORKDIR /src
COPY constraints.txt ./
# Without sources this brings what Steersman depends on, in a layer that a change of the sources leaves as it is.
COPY pyproject.toml LICENSE ./
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    touch README.md \
    && pip install ".[cli]" \
    && pip uninstall --yes steersman \
    && echo /opt/sources > "$(echo /opt/steersman/lib/python3*/site-packages)/steersman.pth"

FROM build AS steersman
COPY README.md ./
COPY client client
COPY services services
COPY trainer trainer
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    pip install --no-deps --target /opt/sources .

FROM ${BASE_IMAGE}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 tini \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 steersman \
    && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin steersman
COPY --from=build /opt/steersman /opt/steersman
COPY --from=steersman /opt/sources /opt/sources
# Nothing is written outside volumes: caches of libraries go to HOME, and no module comes from the working directory.
ENV PATH=/opt/sources/bin:/opt/steersman/bin:$PATH HOME=/tmp \
    PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /tmp
USER 10001:10001
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="steersman-client" \
      org.opencontainers.image.description="Steersman command and client" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# Python as process 1 would not end at SIGTERM.
ENTRYPOINT ["tini", "--", "steersman"]
