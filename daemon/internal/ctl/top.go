//go:build linux

package ctl

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/survey"
	"github.com/probelet/probelet/daemon/internal/table"
)

const topHelp = `Shows the endpoints that are answered most, and updates until Ctrl-C. HITS/S is the rate of probes answered in the kernel since
the last update; observed/s, above the table, is the rate of probes that were passed to pods. The daemon need not be running.`

func topCommand(env *environment) *cobra.Command {
	var where place
	var interval time.Duration
	var times int
	var only namespaceFilter
	cmd := &cobra.Command{
		Use:   "top",
		Short: "Show what is answered most, live",
		Long:  topHelp,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if interval < 100*time.Millisecond {
				return status.Errorf(status.Usage, "--interval %s: must be at least 100ms", interval)
			}
			if times < 0 {
				return status.Errorf(status.Usage, "--iterations %d: must not be negative", times)
			}
			return top(cmd.Context(), env, where, only, interval, times)
		},
	}
	cmd.Flags().DurationVarP(&interval, "interval", "d", time.Second, "`TIME` between updates")
	cmd.Flags().IntVar(&times, "iterations", 0, "number of `UPDATES`; 0: until Ctrl-C")
	only.flags(cmd)
	where.flags(cmd)
	return cmd
}

func top(ctx context.Context, env *environment, where place, only namespaceFilter, interval time.Duration, times int) error {
	before, err := env.read(where)
	if err != nil {
		return err
	}
	last := env.now()
	for i := 0; times == 0 || i < times; i++ {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(interval):
		}
		s, err := env.read(where)
		if err != nil {
			return err
		}
		now := env.now()
		text := topTable(env, before, only.of(s), time.Duration(now-last).Seconds())
		if terminalHeight(env) > 0 {
			text = "\x1b[H\x1b[2J" + text
		}
		if _, err := fmt.Fprint(env.stdout, text); err != nil {
			return err
		}
		before, last = s, now
	}
	return nil
}

// usage is a row of the table.
type usage struct {
	pod, endpoint, state, age string
	rate                      float64
	hits                      uint64
}

func topTable(env *environment, before, now survey.Status, elapsed float64) string {
	elapsed = max(elapsed, 1e-9)
	hits := map[string]uint64{}
	for _, a := range before.Attachments {
		for _, e := range a.Endpoints {
			hits[a.ContainerID+a.IfName+e.Endpoint.Endpoint().String()] = e.Hits
		}
	}
	var all []usage
	for _, a := range now.Attachments {
		for _, e := range a.Endpoints {
			u := usage{pod: cmp.Or(a.Pod, "-"), endpoint: e.Endpoint.Endpoint().String(), state: string(e.State), age: "-", hits: e.Hits}
			if was, known := hits[a.ContainerID+a.IfName+u.endpoint]; known && e.Hits >= was {
				u.rate = float64(e.Hits-was) / elapsed
			}
			if e.Age != nil {
				u.age = status.Duration(*e.Age).String()
			}
			all = append(all, u)
		}
	}
	slices.SortStableFunc(all, func(a, b usage) int {
		return cmp.Or(cmp.Compare(b.rate, a.rate), cmp.Compare(b.hits, a.hits), cmp.Compare(a.pod, b.pod))
	})
	per := func(names ...string) (rate float64) {
		for _, name := range names {
			rate += (float64(now.Counters[name]) - float64(before.Counters[name])) / elapsed
		}
		return rate
	}
	var text strings.Builder
	var heading table.Text
	heading.Line(now.Daemon.String())
	heading.Line(fmt.Sprintf("answered/s: %.1f HTTP, %.1f TCP; observed/s: %.1f; handed over/s: %.1f; endpoints: %d",
		per("answered_http"), per("answered_tcp"), per("observed"), per("handed_over"), len(all)))
	heading.Line("")
	_ = heading.Write(&text, env.width) // cannot fail: it writes to memory
	t := table.Table{Header: []string{"NAMESPACE/POD", "ENDPOINT", "STATE", "AGE", "HITS/S", "HITS"}, Optional: []int{3, 2}}
	for _, u := range all[:min(len(all), rows(env, strings.Count(text.String(), "\n")))] {
		t.Rows = append(t.Rows, []string{u.pod, u.endpoint, u.state, u.age, fmt.Sprintf("%.1f", u.rate), strconv.FormatUint(u.hits, 10)})
	}
	_ = t.Write(&text, env.width)
	return text.String()
}

// rows returns how many endpoints fit on the terminal below a heading of that many lines.
func rows(env *environment, heading int) int {
	heading += 2 // the table's own heading, and the line of the cursor
	if height := terminalHeight(env); height > 0 {
		return max(1, height-heading)
	}
	return 1 << 30
}

// terminalHeight returns the height of the terminal in lines; 0 if stdout is not one.
func terminalHeight(env *environment) int {
	if f, ok := env.stdout.(*os.File); ok {
		return table.HeightOf(f)
	}
	return 0
}
