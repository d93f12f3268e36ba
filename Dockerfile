# The image for CPUs and TPUs, which launch/gke/ runs too:
#   docker build --tag grok .
#   docker run --rm grok quickstart
#   docker build --tag us-docker.pkg.dev/my-project/grok/grok:latest .
FROM python:3.12-slim
WORKDIR /grok
COPY requirements.lock requirements-uv.lock ./
RUN pip install --no-cache-dir --require-hashes --requirement requirements-uv.lock
RUN uv pip sync --system --no-cache --require-hashes requirements.lock
COPY . .
RUN uv pip install --system --no-cache --no-deps --no-build-isolation --editable .
ENTRYPOINT ["grok"]
