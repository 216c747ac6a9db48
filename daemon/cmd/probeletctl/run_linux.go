package main

import (
	"context"

	"github.com/probelet/probelet/daemon/internal/ctl"
	"github.com/probelet/probelet/daemon/internal/kubectl"
)

func run(ctx context.Context, args []string) int {
	if kubectl.Named(args[0]) {
		return kubectl.Main(ctx, args)
	}
	return ctl.Main(ctx, args)
}
