# The two commands of README on a CPU:
#   docker build -t d2v-fast . && docker run --rm --shm-size=2g d2v-fast
# pip takes the CUDA build of torch unless it is given an index with CPU builds: --build-arg PIP_EXTRA_INDEX_URL=…
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends cmake g++ make && rm -rf /var/lib/apt/lists/*
ARG PIP_EXTRA_INDEX_URL
WORKDIR /d2v-fast
COPY . .
RUN pip install --no-cache-dir torch==2.13.0 && pip install --no-cache-dir .
CMD ["sh", "-c", "d2v-train --config vision/tiny-2 train.output=/tmp/demo && d2v-probe /tmp/demo"]
