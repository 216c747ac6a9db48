//go:build !linux

package main

import (
	"context"

	"github.com/probelet/probelet/daemon/internal/kubectl"
)

// run is the kubectl plugin, whatever the program is called: there is no node to look at.
func run(ctx context.Context, args []string) int { return kubectl.Main(ctx, args) }
