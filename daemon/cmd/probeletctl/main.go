// Command probeletctl shows what probelet knows and does on this node. Started as kubectl-probelet it is a kubectl plugin, which is
// all it is on systems other than Linux.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process
	os.Exit(run(ctx, os.Args))
}
