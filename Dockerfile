# One image for both processes: `serve` by default, `shim` as the command.
# Beyond loopback the server needs POINTBOOK_TLS_CERT_FILE and POINTBOOK_TLS_KEY_FILE, and the shim their POINTBOOK_HTTP_
# counterparts or a TLS proxy; POINTBOOK_ALLOW_PLAINTEXT=true is for a network that encrypts by itself.

# The digest names one index of images for all platforms (Python 3.13.16). To renew it:
# docker buildx imagetools inspect python:3.13-slim-trixie
FROM python:3.13-slim-trixie@sha256:3dd7cc108ec1493442514f5c2a871af6af0ec31d768ff6e378a93340c3b3db5f AS build
WORKDIR /build
COPY deploy/ deploy/
# Nothing is compiled here, and everything that is installed is named by its hash.
RUN python -m venv /opt/build \
    && /opt/build/bin/pip install --no-cache-dir --require-hashes --only-binary :all: -r deploy/build.lock \
    && python -m venv --without-pip /opt/pointbook \
    && /opt/build/bin/pip --python /opt/pointbook/bin/python install --no-cache-dir --require-hashes --only-binary :all: -r deploy/requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY gen/ gen/
COPY service/ service/
RUN /opt/build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir wheels ./gen ./service/pointbook_client . \
    && /opt/build/bin/pip --python /opt/pointbook/bin/python install --no-cache-dir --no-deps --no-index wheels/*.whl

FROM python:3.13-slim-trixie@sha256:3dd7cc108ec1493442514f5c2a871af6af0ec31d768ff6e378a93340c3b3db5f
RUN python -m pip uninstall --yes --root-user-action ignore pip \
    && useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin pointbook \
    # A new volume here belongs to this user.
    && install --directory --owner pointbook /var/lib/pointbook
COPY --from=build /opt/pointbook /opt/pointbook
ENV PATH=/opt/pointbook/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001
EXPOSE 50051 8080
# It asks by the standard gRPC health protocol, over TLS where the settings say so; for the shim, run the container with
# --health-cmd "pointbook health --shim", which asks /readyz.
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s CMD ["pointbook", "health"]
ENTRYPOINT ["pointbook"]
CMD ["serve"]
