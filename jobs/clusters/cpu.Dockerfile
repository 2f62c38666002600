# For the head and for CPU workers; all that it installs is in requirements-cpu.lock. From the top of the repository:
#   docker build -f jobs/clusters/cpu.Dockerfile -t cpt-ray:cpu .
FROM rayproject/ray:2.60.0-py311
# only torch+cpu is from there
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# made by the image's user, since WORKDIR makes folders for root
RUN mkdir cpt
WORKDIR cpt
COPY --chown=ray requirements-cpu.lock ./
RUN pip install --no-cache-dir --no-deps -r requirements-cpu.lock
COPY --chown=ray pyproject.toml README.md LICENSE ./
COPY --chown=ray cpt_ray cpt_ray
COPY --chown=ray jobs jobs
COPY --chown=ray rubrics rubrics
RUN pip install --no-cache-dir --no-deps --no-build-isolation .
