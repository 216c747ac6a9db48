//go:build linux

package ctl

import (
	"bytes"
	"encoding"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	generator "github.com/invopop/jsonschema"
	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/survey"
	"github.com/probelet/probelet/daemon/internal/survey/surveytest"
)

var update = flag.Bool("update", false, "write docs/status.schema.json")

const schemaFile = "../../../docs/status.schema.json"

// reflected returns the schema of Status, with the comments of its fields as descriptions.
func reflected(t *testing.T) []byte {
	t.Helper()
	// Types that marshal themselves to text are strings.
	marshaler := reflect.TypeFor[encoding.TextMarshaler]()
	r := &generator.Reflector{Mapper: func(t reflect.Type) *generator.Schema {
		if t.Implements(marshaler) {
			return &generator.Schema{Type: "string"}
		}
		return nil
	}}
	for _, dir := range []string{"daemon/internal/survey", "daemon/internal/statedir", "daemon/internal/probe", "daemon/internal/api", "daemon/internal/status", "daemon/internal/store"} {
		if err := r.AddGoComments("github.com/probelet/probelet", filepath.Join("../../..", dir)); err != nil {
			t.Fatal(err)
		}
	}
	comments := map[string]string{}
	for name, text := range r.CommentMap {
		// The generator takes the relative path for part of the package path.
		if i := strings.Index(name, "daemon/"); i >= 0 {
			name = "github.com/probelet/probelet/" + name[i:]
		}
		comments[name] = text
	}
	r.CommentMap = comments
	schema := r.Reflect(&survey.Status{})
	schema.ID, schema.Title = "", "probeletctl status -o json"
	text, err := json.MarshalIndent(schema, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	return append(text, '\n')
}

// The documented schema matches the types. To update it: go test ./daemon/internal/ctl -run Schema -update
func TestSchemaIsDocumented(t *testing.T) {
	want := reflected(t)
	if *update {
		if err := os.WriteFile(schemaFile, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(schemaFile)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s does not match the types (-update writes it): %v", schemaFile, err)
	}
}

// The output matches the documented schema.
func TestOutputMatchesTheSchema(t *testing.T) {
	schema, err := jsonschema.NewCompiler().Compile(schemaFile)
	if err != nil {
		t.Fatal(err)
	}
	empty, full := newMachine(t), newMachine(t)
	empty.Kernel = nil
	full.Daemon()
	e := surveytest.Endpoint(probe.HTTP, 8080, "/ready")
	e.HeadersID, e.InstanceID, e.StalenessCapped, e.Refresh = "abcd", "b", true, 5
	full.Kernel.NeighboursOf = map[int][]attach.Neighbour{7: {{Hook: "xdp", What: "XDP program 3", Before: true}}}
	full.Web(surveytest.Maps{
		datapath.PortKey(8080):           {Evidence: surveytest.Success(4, 7, 0), Tally: surveytest.Withdrawn(9)},
		surveytest.KeyOf(8080, "/ready"): {Evidence: surveytest.Success(4, 7, 204), Tally: datapath.Tally{Hits: 3, AnsweredAt: surveytest.Now}},
	}, e, surveytest.Endpoint(probe.TCP, 81, ""))
	full.Lose("unobserved")
	for name, m := range map[string]*machine{"nothing loaded": empty, "something": full} {
		var value any
		if err := json.Unmarshal([]byte(m.status("-o", "json")), &value); err != nil {
			t.Fatal(err)
		}
		if err := schema.Validate(value); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := schema.Validate(map[string]any{"daemon": map[string]any{"running": "yes"}}); err == nil {
		t.Error("the schema accepts anything")
	}
}
