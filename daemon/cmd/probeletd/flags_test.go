package main

import (
	"testing"

	"github.com/spf13/pflag"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// What somebody chose is a limit, even if it is the built-in one.
func TestChosenStaleness(t *testing.T) {
	for name, test := range map[string]struct {
		args, environ      []string
		staleness, ceiling bool
	}{
		"nothing":     {nil, nil, false, false},
		"flags":       {[]string{"--staleness=1", "--staleness-ceiling=5"}, nil, true, true},
		"environment": {nil, []string{"PROBELET_STALENESS_CEILING", "5"}, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			if test.environ != nil {
				t.Setenv(test.environ[0], test.environ[1])
			}
			var got probe.Defaults
			flags := pflag.NewFlagSet("", pflag.ContinueOnError)
			policyFlags(flags, &got)
			if err := flags.Parse(test.args); err != nil {
				t.Fatal(err)
			}
			if err := fromEnvironment(flags); err != nil {
				t.Fatal(err)
			}
			noteChosen(flags, &got)
			want := probe.NewDefaults()
			want.StalenessSet, want.CeilingSet = test.staleness, test.ceiling
			if got != want {
				t.Errorf("got %+v, want %+v", got, want)
			}
		})
	}
}
