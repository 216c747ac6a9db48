package status

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"
)

// docs/probeletctl.md lists every exit code.
func TestExitCodesAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../../../docs/probeletctl.md")
	if err != nil {
		t.Fatal(err)
	}
	var documented []string
	for _, row := range regexp.MustCompile(`(?m)^\| (\d) \|`).FindAllStringSubmatch(string(text), -1) {
		documented = append(documented, row[1])
	}
	if want := fmt.Sprint([]int{OK, Failed, Usage, DaemonDown, NotFound, NotAllowed}); fmt.Sprint(documented) != want {
		t.Errorf("documented: %s, want %s", documented, want)
	}
}

func TestExit(t *testing.T) {
	for name, test := range map[string]struct {
		err  error
		code int
		says string
	}{
		"nothing":       {nil, OK, ""},
		"any error":     {errors.New("broken"), Failed, "x: broken\n"},
		"with a code":   {Errorf(NotFound, "no pod %s", "p"), NotFound, "x: no pod p\n"},
		"wrapped":       {fmt.Errorf("node n: %w", Errorf(Usage, "bad")), Usage, "x: node n: bad\n"},
		"already shown": {&Error{Code: DaemonDown, Err: errors.New("down"), Shown: true}, DaemonDown, ""},
	} {
		var stderr strings.Builder
		if code := Exit(&stderr, "x", test.err); code != test.code || stderr.String() != test.says {
			t.Errorf("%s: %d, %q", name, code, &stderr)
		}
	}
}

func TestStill(t *testing.T) {
	now := time.Date(2026, 11, 27, 12, 0, 0, 0, time.UTC)
	for _, test := range []struct {
		still *Still
		want  string
	}{
		{nil, "what the kernel still answers is unknown"},
		{&Still{}, "nothing is answered, so every probe reaches its pod"},
		{&Still{1, 0.25}, "1 endpoint is still answered in the kernel, until 12:00:00 UTC (300ms from now) at the latest; nothing renews that"},
		{&Still{3, 90}, "3 endpoints are still answered in the kernel, until 12:01:30 UTC (1m30s from now) at the latest; nothing renews that"},
	} {
		if got := test.still.Words(now); got != test.want {
			t.Errorf("%+v: %q, want %q", test.still, got, test.want)
		}
	}
}

func TestShare(t *testing.T) {
	for want, p := range map[string]Probes{"-": {}, "75 %": {30, 10}, "0 %": {0, 7}, "100 %": {7, 0}} {
		if got := p.Share(); got != want {
			t.Errorf("%+v: %s, want %s", p, got, want)
		}
	}
}
