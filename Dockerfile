# docker build -t YOUR_REGISTRY/probelet .
FROM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
RUN CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o /out/probelet ./plugin && \
    CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o /out/ ./daemon/cmd/...

FROM scratch
COPY --from=build /out/ /usr/local/bin/
ENV PATH=/usr/local/bin
ENTRYPOINT ["/usr/local/bin/probeletd"]
