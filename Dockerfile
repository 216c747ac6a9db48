# docker build -t YOUR_REGISTRY/probelet --build-arg VERSION=v1.2.3 .
FROM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
# What the programs say that they are; the sources here come without version control.
ARG VERSION=
RUN flags="-s -w -X github.com/probelet/probelet/internal/version.linked=$VERSION" && export CGO_ENABLED=0 && \
    go build -trimpath -ldflags "$flags" -o /out/probelet ./plugin && \
    go build -trimpath -ldflags "$flags" -o /out/ ./daemon/cmd/...

FROM scratch
COPY --from=build /out/ /usr/local/bin/
ENV PATH=/usr/local/bin
ENTRYPOINT ["/usr/local/bin/probeletd"]
