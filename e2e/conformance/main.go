// Command conformance runs Kubernetes' own specs of probes and StatefulSets on a cluster of one node: without probelet, and
// with it in several variants. It prints the duration of each spec, and fails where probelet makes an unacceptable
// difference. "make conformance" runs it in its source directory.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/probelet/probelet/e2e/harness/node"
)

// variant is a way to run the specs.
type variant struct {
	name   string
	values map[string]any // for the chart; nil: without probelet
}

var variants = []variant{
	{plain, nil},
	{usual, map[string]any{}},
	{"stale5", map[string]any{"config": map[string]any{"staleness": "5"}}},
	{"refresh", map[string]any{"config": map[string]any{"refresh": "true"}}},
	{"xdp", map[string]any{"hook": "xdp"}},
}

// The variants that are compared with each other: without probelet, and with its defaults.
const (
	plain = "none"
	usual = "default"
)

// named returns the variant with this name.
func named(name string) (variant, error) {
	i := slices.IndexFunc(variants, func(v variant) bool { return v.name == name })
	if i < 0 {
		return variant{}, fmt.Errorf("unknown variant %q", name)
	}
	return variants[i], nil
}

// options are the command-line options.
type options struct {
	variants          []string // names
	focus, out, tools string
	procs             int
}

// begin is the start of the command, in seconds since 1970.
var begin = time.Now().Unix()

// say prints progress.
func say(format string, args ...any) {
	fmt.Printf("%5ds %s\n", time.Now().Unix()-begin, fmt.Sprintf(format, args...))
}

func main() {
	var o options
	var names []string
	for _, v := range variants {
		names = append(names, v.name)
	}
	list := flag.String("variants", strings.Join(names, ","), "comma-separated `names` of variants to run")
	flag.StringVar(&o.focus, "focus", focus, "`regexp` of the specs")
	flag.StringVar(&o.out, "out", "", "`directory` for reports and logs, with a subdirectory per variant")
	flag.StringVar(&o.tools, "tools", "", "`directory` of the cluster's programs")
	flag.IntVar(&o.procs, "procs", 20, "`number` of specs to run in parallel; they mostly wait")
	one := flag.String("variant", "", "run only this variant, without comparing (used internally)")
	flag.Int64Var(&begin, "begin", begin, "start of the command, in `seconds` since 1970 (used internally)")
	flag.Parse()
	o.variants = strings.Split(*list, ",")
	if *one != "" {
		os.Exit(node.Run(func(m *node.Machine) int { return exitCode(o.run(m, *one)) }))
	}
	os.Exit(exitCode(o.all()))
}

func exitCode(err error) int {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// all runs the variants one after another, and compares them.
func (o options) all() (err error) {
	if err := node.Suited(); err != nil {
		return err
	}
	for _, dir := range []*string{&o.out, &o.tools} {
		if *dir, err = filepath.Abs(*dir); err != nil {
			return err
		}
	}
	for _, name := range o.variants {
		if _, err := named(name); err != nil {
			return err
		}
	}
	var results []result
	for _, name := range o.variants {
		r, err := o.start(name, o.focus, name)
		if err != nil {
			return err
		}
		results = append(results, r)
	}
	fmt.Print(table(results))
	problems := append(compare(results), idle(results)...)
	if names := slower(find(results, plain), find(results, usual)); len(names) > 0 {
		again, err := o.again(names)
		if err != nil {
			return err
		}
		problems = append(problems, again...)
	}
	if len(problems) > 0 {
		return fmt.Errorf("%d PROBLEMS:\n%s", len(problems), strings.Join(problems, "\n"))
	}
	say("all specs passed; none differs from plain Kubernetes in restarts, or takes more than %.1f times as long with the defaults", slowest)
	return nil
}

// again repeats the specs that took too long, without the others: a busy machine slows specs down, too.
func (o options) again(names []string) (problems []string, err error) {
	say("%d specs took more than %.1f times as long with probelet: running them again, without the others", len(names), slowest)
	var quoted []string
	for _, name := range names {
		quoted = append(quoted, regexp.QuoteMeta(name))
	}
	var results []result
	for _, name := range []string{plain, usual} {
		r, err := o.start(name, strings.Join(quoted, "|"), name+"-again")
		if err != nil {
			return nil, err
		}
		results = append(results, r)
	}
	fmt.Print(table(results))
	problems = compare(results)
	for _, name := range slower(results[0], results[1]) {
		problems = append(problems, fmt.Sprintf("takes more than %.1f times as long with probelet: %s", slowest, name))
	}
	return problems, nil
}

// start runs a variant in its own process and on its own cluster, and returns the result.
func (o options) start(name, focus, dir string) (result, error) {
	dir = filepath.Join(o.out, dir)
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o755)); err != nil {
		return result{}, err
	}
	say("variant %s", name)
	cmd := exec.Command("/proc/self/exe", "-variant", name, "-focus", focus, "-out", dir, "-tools", o.tools,
		"-procs", strconv.Itoa(o.procs), "-begin", strconv.FormatInt(begin, 10))
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return result{}, fmt.Errorf("variant %s: %w; logs are in %s", name, err, dir)
	}
	return load(name, dir)
}
