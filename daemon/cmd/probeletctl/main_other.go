//go:build !linux

// Command probeletctl is a plugin of kubectl on systems other than Linux, under whatever name.
package main

import (
	"context"
	"os"
	"os/signal"

	"github.com/probelet/probelet/daemon/internal/kubectl"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	os.Exit(kubectl.Main(ctx, os.Args))
}
