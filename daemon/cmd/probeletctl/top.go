package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

const topHelp = `Shows the endpoints that are answered most, again and again until Ctrl-C. HITS/S are probes answered in the kernel since the
last time, and OBSERVED/S, in the first line, those that were passed to pods. The daemon need not run.`

func topCommand(env environment) *cobra.Command {
	var where place
	var interval time.Duration
	var times int
	cmd := &cobra.Command{
		Use:   "top",
		Short: "Show what is answered most, live",
		Long:  topHelp,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if interval < 100*time.Millisecond {
				return fmt.Errorf("--interval %s: must be at least 100ms", interval)
			}
			if times < 0 {
				return fmt.Errorf("--iterations %d: must not be negative", times)
			}
			return top(cmd.Context(), env, where, interval, times)
		},
	}
	cmd.Flags().DurationVarP(&interval, "interval", "d", time.Second, "`TIME` from one to the next")
	cmd.Flags().IntVarP(&times, "iterations", "n", 0, "how many `TIMES`; 0: until Ctrl-C")
	where.flags(cmd)
	return cmd
}

func top(ctx context.Context, env environment, where place, interval time.Duration, times int) error {
	before, err := collect(env, where)
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
		s, err := collect(env, where)
		if err != nil {
			return err
		}
		now := env.now()
		text := topTable(before, s, *seconds(now, last), rows(env))
		if isTerminal(env) {
			text = "\x1b[H\x1b[2J" + text
		}
		if _, err := fmt.Fprint(env.stdout, text); err != nil {
			return err
		}
		before, last = s, now
	}
	return nil
}

// usage is a line of the table.
type usage struct {
	pod, endpoint, state, age string
	rate                      float64
	hits                      uint64
}

func topTable(before, now Status, elapsed float64, most int) string {
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
				u.age = duration(*e.Age).String()
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
	fmt.Fprintf(&text, "%s\nanswered/s: %.1f HTTP, %.1f TCP; observed/s: %.1f; handed over/s: %.1f; endpoints: %d\n\n",
		now.Daemon, per("answered_http"), per("answered_tcp"), per("observed"), per("handed_over"), len(all))
	table := tabwriter.NewWriter(&text, 0, 0, 3, ' ', 0)
	_, _ = fmt.Fprintln(table, "NAMESPACE/POD\tENDPOINT\tSTATE\tAGE\tHITS/S\tHITS")
	for _, u := range all[:min(len(all), most)] {
		_, _ = fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%.1f\t%d\n", u.pod, u.endpoint, u.state, u.age, u.rate, u.hits)
	}
	_ = table.Flush() // into memory
	return text.String()
}

func isTerminal(env environment) bool {
	_, ok := size(env)
	return ok
}

// rows are how many endpoints fit the terminal.
func rows(env environment) int {
	const heading = 5
	if height, ok := size(env); ok {
		return max(1, height-heading)
	}
	return 1 << 30
}

func size(env environment) (height int, terminal bool) {
	f, ok := env.stdout.(*os.File)
	if !ok {
		return 0, false
	}
	window, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 0, false
	}
	return int(window.Row), true
}
