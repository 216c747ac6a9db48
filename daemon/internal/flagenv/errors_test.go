package flagenv

import (
	"errors"
	"fmt"
	"log/slog"
	"testing"

	"github.com/spf13/pflag"
)

// mode is a flag of a type of our own.
type mode struct{}

func (*mode) String() string     { return "" }
func (*mode) Type() string       { return "mode" }
func (*mode) Set(s string) error { return fmt.Errorf("%q: must be answer, observe or off", s) }

func TestReword(t *testing.T) {
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	flags.Bool("events", true, "")
	flags.Duration("drain", 0, "")
	flags.Int("width", 0, "")
	flags.Uint16P("port", "p", 0, "")
	flags.Var(&mode{}, "mode", "")
	flags.TextVar(&slog.LevelVar{}, "log-level", &slog.LevelVar{}, "")
	for argument, want := range map[string]string{
		"--events=x":       `--events "x": must be true or false`,
		"--drain=5":        `--drain "5": must be a duration, such as 10s`,
		"--width=wide":     `--width "wide": must be a whole number`,
		"-p=70000":         `--port "70000": must be a whole number from 0 to 65535`,
		"--mode=on":        `--mode "on": must be answer, observe or off`,
		"--log-level=loud": `--log-level "loud": must be debug, info, warn or error`,
		"--nonsense":       "unknown flag: --nonsense",
	} {
		if err := Reword(flags.Parse([]string{argument})); err == nil || err.Error() != want {
			t.Errorf("%s: %v, want %s", argument, err, want)
		}
	}
	if err := errors.New("other"); Reword(err) != err {
		t.Error("an error that is not pflag's was changed")
	}
}
