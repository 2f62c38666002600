# For GPU workers; all that it installs is in requirements-cuda.lock. From the top of the repository:
#   docker build -f jobs/clusters/cuda.Dockerfile -t cpt-ray:cuda .
# The wheels bring CUDA 13, whatever the image has; the node needs an NVIDIA driver of 580 or newer.
FROM rayproject/ray:2.60.0-py311-gpu
# made by the image's user, since WORKDIR makes folders for root
RUN mkdir cpt
WORKDIR cpt
COPY --chown=ray requirements-cuda.lock ./
RUN pip install --no-cache-dir --no-deps -r requirements-cuda.lock
COPY --chown=ray pyproject.toml README.md LICENSE ./
COPY --chown=ray cpt_ray cpt_ray
COPY --chown=ray jobs jobs
COPY --chown=ray rubrics rubrics
RUN pip install --no-cache-dir --no-deps --no-build-isolation .
