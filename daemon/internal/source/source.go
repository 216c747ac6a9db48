// Package source says which pods there are and what they are probed for.
package source

import (
	"context"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// Source yields snapshots, each complete: a pod that is missing from one is gone.
type Source interface {
	// Run sends a snapshot at once and after every change, until ctx ends. An error means that there will be no more.
	Run(ctx context.Context, snapshots chan<- []probe.Pod) error
}
