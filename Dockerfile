# docker build -t prompttune .                             runs on the CPU
# docker build -t prompttune:cuda --build-arg VARIANT=cuda .   runs on the GPU too
# docker run --rm -p 8000:8000 -p 8001:8001 -v "$PWD/engine:/mnt/models:ro" prompttune
# docker run --rm --gpus all -v "$PWD:/work" prompttune:cuda doctor
#
# Both variants start from the same base: torch and onnxruntime-gpu bring CUDA as Python packages, and the driver
# comes from the host through the NVIDIA container toolkit. A CUDA base image would hold those libraries twice.
# VARIANT chooses the build of ONNX Runtime. An index with CPU-only builds of torch and torchvision, given as
# --build-arg PIP_EXTRA_INDEX_URL=..., makes the image for the CPU several gigabytes smaller.
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY prompttune prompttune
COPY export export
COPY serve serve
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM python:${PYTHON_VERSION}-slim AS environment
ARG VARIANT=cpu
ARG PIP_EXTRA_INDEX_URL=
WORKDIR /build
RUN python -m venv /opt/prompttune
# The dependencies change seldom and weigh most: their layer does not depend on the sources.
COPY pyproject.toml constraints.txt ./
COPY scripts/image_requirements.py scripts/
RUN python scripts/image_requirements.py "$VARIANT" > requirements.txt \
    && /opt/prompttune/bin/pip install --no-cache-dir -c constraints.txt -r requirements.txt
COPY --from=wheel /dist /dist
RUN /opt/prompttune/bin/pip install --no-cache-dir --no-deps /dist/*.whl

FROM python:${PYTHON_VERSION}-slim
# The owner of what the container writes into a mounted folder: --build-arg UID=$(id -u)
ARG UID=1000
RUN useradd --uid "$UID" --create-home prompttune && install --directory --owner="$UID" /work
COPY --from=environment /opt/prompttune /opt/prompttune
ENV PATH=/opt/prompttune/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PROMPTTUNE_HOST=0.0.0.0 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# By number, so that a cluster can verify that it is not root. The folder holds no sources: Python would find
# ./prompttune there before the installed package.
USER ${UID}
WORKDIR /work
# HTTP and gRPC
EXPOSE 8000 8001
# Serving drains on it.
STOPSIGNAL SIGTERM
# Clusters have probes of their own. A container that runs another command than serve is never healthy.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --start-interval=2s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=4)"]
ENTRYPOINT ["prompttune"]
CMD ["serve", "/mnt/models"]
