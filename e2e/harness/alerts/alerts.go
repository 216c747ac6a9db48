// Package alerts reads alerting rules and evaluates them over in-memory series, as Prometheus does.
package alerts

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/util/annotations"
)

// Minutes is the length of a series, with one sample and one evaluation per minute.
const Minutes = 120

// Read reads a file of rules, which must form a single group.
func Read(file string) ([]rulefmt.Rule, error) {
	groups, errs := rulefmt.ParseFile(file, false, model.UTF8Validation, newParser(), slog.Default())
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	if len(groups.Groups) != 1 {
		return nil, fmt.Errorf("%s: %d groups", file, len(groups.Groups))
	}
	return groups.Groups[0].Rules, nil
}

func newParser() parser.Parser { return parser.NewParser(parser.Options{}) }

// Series holds series in memory.
type Series []promql.Series

// Load parses series in the notation of Prometheus' rule tests, such as m{a="b"} 0x5 1x5, one per line.
func Load(text string) (all Series, err error) {
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		metric, values, err := newParser().ParseSeriesDesc(line)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", line, err)
		}
		series := promql.Series{Metric: metric}
		for minute, v := range values {
			if !v.Omitted {
				series.Floats = append(series.Floats, promql.FPoint{T: int64(minute) * time.Minute.Milliseconds(), F: v.Value})
			}
		}
		all = append(all, series)
	}
	return all, nil
}

// Scraped parses what a target exposes, as if the values had always been the same.
func Scraped(text string) (Series, error) {
	var lines strings.Builder
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			fmt.Fprintf(&lines, "%sx%d\n", line, Minutes)
		}
	}
	return Load(lines.String())
}

// Firing is an alert that fired, with its labels.
type Firing struct {
	Alert  string
	Labels labels.Labels
}

// Evaluate returns the alerts that fire, in the order of the rules.
func (s Series) Evaluate(rules []rulefmt.Rule) (all []Firing, err error) {
	engine := promql.NewEngine(promql.EngineOpts{MaxSamples: 1e6, Timeout: time.Minute, LookbackDelta: 5 * time.Minute, Parser: newParser()})
	defer engine.Close() //nolint:errcheck // nothing is lost
	for _, rule := range rules {
		since := map[string]time.Time{} // by labels
		fired := map[string]bool{}
		for minute := range Minutes {
			now := time.Unix(0, 0).Add(time.Duration(minute) * time.Minute)
			found, err := query(engine, s, rule.Expr, now)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", rule.Alert, err)
			}
			pending := map[string]time.Time{}
			for _, sample := range found {
				key := sample.Metric.String()
				begin, was := since[key]
				if !was {
					begin = now
				}
				pending[key] = begin
				if now.Sub(begin) >= time.Duration(rule.For) && !fired[key] {
					fired[key] = true
					all = append(all, Firing{rule.Alert, sample.Metric})
				}
			}
			since = pending
		}
	}
	return all, nil
}

func query(engine *promql.Engine, from storage.Queryable, expr string, at time.Time) (promql.Vector, error) {
	ctx := context.Background()
	q, err := engine.NewInstantQuery(ctx, from, nil, expr, at)
	if err != nil {
		return nil, err
	}
	defer q.Close()
	vector, err := q.Exec(ctx).Vector()
	return slices.Clone(vector), err
}

// Querier implements storage.Queryable.
func (s Series) Querier(int64, int64) (storage.Querier, error) {
	return querier{storage.NoopQuerier(), s}, nil
}

type querier struct {
	storage.Querier
	all Series
}

// Select implements storage.Querier.
func (q querier) Select(_ context.Context, _ bool, _ *storage.SelectHints, matchers ...*labels.Matcher) storage.SeriesSet {
	found := &seriesSet{}
	for _, series := range q.all {
		if !slices.ContainsFunc(matchers, func(m *labels.Matcher) bool { return !m.Matches(series.Metric.Get(m.Name)) }) {
			found.left = append(found.left, promql.NewStorageSeries(series))
		}
	}
	return found
}

type seriesSet struct {
	now  storage.Series
	left []storage.Series
}

// Next implements storage.SeriesSet.
func (s *seriesSet) Next() bool {
	if len(s.left) == 0 {
		return false
	}
	s.now, s.left = s.left[0], s.left[1:]
	return true
}

// At implements storage.SeriesSet.
func (s *seriesSet) At() storage.Series { return s.now }

// Err implements storage.SeriesSet.
func (*seriesSet) Err() error { return nil }

// Warnings implements storage.SeriesSet.
func (*seriesSet) Warnings() annotations.Annotations { return nil }
