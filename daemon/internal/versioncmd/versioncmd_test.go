package versioncmd

import (
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

func TestCommandAndFlagAgree(t *testing.T) {
	print := func(arg string) string {
		var out strings.Builder
		root := &cobra.Command{
			Use: "probelet", Version: "v1.2.3",
			Annotations: map[string]string{cobra.CommandDisplayNameAnnotation: "kubectl probelet"},
		}
		root.AddCommand(New())
		root.SetArgs([]string{arg})
		root.SetOut(&out)
		if err := root.Execute(); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	command, flag := print("version"), print("--version")
	if command != flag || command != "kubectl probelet version v1.2.3\n" {
		t.Errorf("version prints %q, --version %q", command, flag)
	}
}
