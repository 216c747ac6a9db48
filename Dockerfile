# docker build -t YOUR_REGISTRY/probelet --build-arg VERSION=v1.2.3 .
FROM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
# The version that the programs report. There is no version control in the build context to take it from.
ARG VERSION=
RUN flags="-s -w -X github.com/probelet/probelet/internal/version.linked=$VERSION" && export CGO_ENABLED=0 && \
    go build -trimpath -ldflags "$flags" -o /out/probelet ./plugin && \
    go build -trimpath -ldflags "$flags" -o /out/ ./daemon/cmd/...

FROM scratch
COPY --from=build /out/ /usr/local/bin/
ENV PATH=/usr/local/bin
# --build-arg REVISION="$(git rev-parse HEAD)" --build-arg CREATED="$(date -u +%FT%TZ)"
ARG VERSION=
ARG REVISION=
ARG CREATED=
LABEL org.opencontainers.image.title="probelet" \
      org.opencontainers.image.description="Answers the kubelet's health probes in the kernel" \
      org.opencontainers.image.source="https://github.com/probelet/probelet" \
      org.opencontainers.image.documentation="https://github.com/probelet/probelet/tree/main/docs" \
      org.opencontainers.image.licenses="MIT AND (GPL-2.0-only OR MIT)" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.created="$CREATED"
ENTRYPOINT ["/usr/local/bin/probeletd"]
