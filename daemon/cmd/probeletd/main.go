// Command probeletd is the daemon: it decides which probes the kernel may answer. It also installs the CNI plugin, and uninstalls
// probelet from a node.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/daemon/internal/agent/metrics"
	"github.com/probelet/probelet/daemon/internal/flagenv"
	"github.com/probelet/probelet/daemon/internal/install"
	"github.com/probelet/probelet/daemon/internal/versioncmd"
	"github.com/probelet/probelet/internal/version"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	if err := execute(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "probeletd:", err)
		os.Exit(1)
	}
}

func execute(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	root := &cobra.Command{
		Use:           "probeletd",
		Short:         "Decides which probes the kernel may answer",
		Version:       version.String(),
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(runCommand(stderr), install.Command(stderr), install.UninstallCommand(stderr), metrics.ProxyCommand(stderr), install.WaitCommand(stderr))
	root.AddCommand(versioncmd.New())
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return flagenv.Reword(err) })
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	return root.ExecuteContext(ctx)
}
