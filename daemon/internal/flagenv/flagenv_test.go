package flagenv

import (
	"slices"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

func TestApply(t *testing.T) {
	t.Setenv("PROBELET_BPF_DIR", "/env/bpf")
	t.Setenv("PROBELET_STATE_DIR", "/env/state")
	t.Setenv("PROBELET_POLL", "/env/poll")
	for name, test := range map[string]struct {
		args, names []string
		want        [3]string // bpf-dir, state-dir, poll
	}{
		"all flags":                {nil, nil, [3]string{"/env/bpf", "/env/state", "/env/poll"}},
		"the command line wins":    {[]string{"--bpf-dir", "/bpf"}, nil, [3]string{"/bpf", "/env/state", "/env/poll"}},
		"only the flags requested": {nil, []string{"bpf-dir", "no-such-flag"}, [3]string{"/env/bpf", "default", "default"}},
	} {
		t.Run(name, func(t *testing.T) {
			var got [3]string
			flags := pflag.NewFlagSet("", pflag.ContinueOnError)
			for i, flag := range []string{"bpf-dir", "state-dir", "poll"} {
				flags.StringVar(&got[i], flag, "default", "")
			}
			if err := flags.Parse(test.args); err != nil {
				t.Fatal(err)
			}
			if err := Apply(flags, test.names...); err != nil {
				t.Fatal(err)
			}
			if got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

func TestApplyNamesInvalidVariables(t *testing.T) {
	t.Setenv("PROBELET_COUNT", "many")
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	flags.Int("count", 0, "")
	if err := Apply(flags); err == nil || !strings.Contains(err.Error(), "$PROBELET_COUNT: ") {
		t.Errorf("got %v, want an error that names $PROBELET_COUNT", err)
	}
}

func TestUnknown(t *testing.T) {
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	flags.String("mode", "", "")
	environ := []string{"PATH=/bin", "PROBELET_MODE=answer", "PROBELET_MOOD=answer", "PROBELETS=1"}
	if got := Unknown(flags, environ); !slices.Equal(got, []string{"PROBELET_MOOD"}) {
		t.Errorf("got %q", got)
	}
}
