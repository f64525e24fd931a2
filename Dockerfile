# Training on TPU hosts, and sizing for them on any machine (docs/launch.md):
#
#   docker build -t neodragon .
#   docker run --rm neodragon train.aot --config=configs/dmd.py --topology=v5e:4x4
#   docker run --rm --privileged --net=host neodragon train.dmd --config=configs/dmd.py ...      (on a TPU host)
# 3.11: the versions that the tests ran with.
FROM python:3.11-slim

# Containers log to files and pipes; bytecode would only fill the image.
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /neodragon
# Packages first: they change less often than the code.
COPY requirements.lock ./
RUN pip install --requirement requirements.lock
COPY . .
# The lock holds every other package; libtpu comes in the version that this jax was released with.
RUN pip install --no-deps --editable . && pip install "jax[tpu]==$(python -c 'import importlib.metadata as m; print(m.version("jax"))')"

# The flags of train/tpu_flags.py, unless the caller sets his own; then any module: train.dmd, train.aot, neodragon_jax.
ENTRYPOINT ["sh", "-c", "export LIBTPU_INIT_ARGS=\"${LIBTPU_INIT_ARGS-$(python -m train.tpu_flags)}\"; exec python -m \"$@\"", "--"]
CMD ["train.aot", "--help"]
