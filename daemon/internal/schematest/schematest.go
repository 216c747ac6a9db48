// Package schematest lets tests keep documented JSON schemas in step with the types that they describe.
package schematest

import (
	"bytes"
	"encoding"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/invopop/jsonschema"
)

// root is the repository, as seen from packages below daemon/internal.
const root = "../../.."

const module = "github.com/probelet/probelet"

// Document checks that a file is the schema of a value's type, with the comments of its fields as descriptions. packages are the
// directories below daemon/internal that declare its types. With update it writes the file first.
func Document(t *testing.T, file, title string, value any, update bool, packages ...string) {
	t.Helper()
	want := reflected(t, title, value, packages)
	if update {
		if err := os.WriteFile(file, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(file)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s does not match the types (-update writes it): %v", file, err)
	}
}

func reflected(t *testing.T, title string, value any, packages []string) []byte {
	t.Helper()
	// Types that marshal themselves to text are strings.
	marshaler := reflect.TypeFor[encoding.TextMarshaler]()
	r := &jsonschema.Reflector{Mapper: func(t reflect.Type) *jsonschema.Schema {
		if t.Implements(marshaler) {
			return &jsonschema.Schema{Type: "string"}
		}
		return nil
	}}
	for _, dir := range packages {
		if err := r.AddGoComments(module, filepath.Join(root, "daemon/internal", dir)); err != nil {
			t.Fatal(err)
		}
	}
	comments := map[string]string{}
	for name, text := range r.CommentMap {
		// The generator takes the relative path for part of the package path.
		if i := strings.Index(name, "daemon/"); i >= 0 {
			name = module + "/" + name[i:]
		}
		comments[name] = text
	}
	r.CommentMap = comments
	schema := r.Reflect(value)
	schema.ID, schema.Title = "", title
	text, err := json.MarshalIndent(schema, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	return append(text, '\n')
}
