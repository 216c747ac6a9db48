package probe

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// ofKind returns an ordinary probe of a kind.
func ofKind(k Kind) Spec {
	s := httpProbe(Readiness, "/x")
	s.Kind = k
	return s
}

func TestEveryKindHasARow(t *testing.T) {
	declared := constants(t)
	names := slices.Sorted(maps.Values(declared))
	if all := slices.Sorted(slices.Values(Kinds())); !slices.Equal(all, names) {
		t.Errorf("the table has %q, but the constants are %q", all, names)
	}
	for _, k := range kinds {
		if observable := k.keying != NotKeyed; observable != (k.success != 0) {
			t.Errorf("%s: keying %d, success %d: an observable kind has both", k.name, k.keying, k.success)
		}
	}
	if Kind("").Observable() || Kind("unknown").Observable() {
		t.Error("a kind that is not in the table is observable")
	}
}

// Probes of each kind behave as the table says.
func TestKinds(t *testing.T) {
	for _, k := range Kinds() {
		t.Run(string(k), func(t *testing.T) {
			e := endpoints(t, ofKind(k))[0]
			if e.Observed != k.Observable() || (e.Reason == Reason{}) != k.Observable() {
				t.Fatalf("observed %t, reason %+v; the kind is observable: %t", e.Observed, e.Reason, k.Observable())
			}
			if !k.Observable() {
				if e.Reason.Code != ReasonKind || !strings.HasPrefix(e.Reason.Text, string(k)+" is never answered") {
					t.Errorf("reason %+v", e.Reason)
				}
				return
			}
			if asks := e.Asks(asked("/x")); asks != (k.Keying() == KeyedByRequest) {
				t.Errorf("it asks a request: %t", asks)
			}
			tracker := track(t, ofKind(k))
			outcome := Outcome{
				Port: e.Port, Kind: k, Request: asked("/x"), Question: Question{1, 2}, Event: k.row().success, Status: 200, ObservedAt: 1010 * second,
			}
			if tracker.Observe(outcome); tracker.Evidence()[e.Endpoint].Result != Success || tracker.Gates()[e.Port] == (Gate{}) {
				t.Errorf("a success is not recorded: %+v", tracker.Evidence())
			}
			if _, decides := tracker.decider(e.Port); decides != (k.Keying() == KeyedByPort) {
				t.Errorf("it decides alone on its port: %t", decides)
			}
		})
	}
}

// A new kind has to be added wherever kinds are named. Everything else asks the table.
func TestWhereKindsAreNamed(t *testing.T) {
	want := []string{
		"internal/estimate/constants.go", // what a probe costs
		"internal/evidence/exchange.go",  // from what was recorded
		"internal/podspec/convert.go",    // from the pod's spec
		"internal/simulate",              // its scenarios, and its model of the kernel side
		"internal/store/store.go",        // to the kernel side's constants
	}
	kinds := slices.Collect(maps.Keys(constants(t)))
	var got []string
	for path, file := range goFiles(t, "../..") {
		if names(file, kinds) {
			path = strings.TrimPrefix(filepath.ToSlash(path), "../../")
			if strings.HasPrefix(path, "internal/simulate/") {
				path = "internal/simulate"
			}
			got = append(got, path)
		}
	}
	slices.Sort(got)
	if got = slices.Compact(got); !slices.Equal(got, want) {
		t.Errorf("kinds are named by\n%q, want\n%q", got, want)
	}
}

// constants returns the constants of type Kind declared in this package.
func constants(t *testing.T) map[string]Kind {
	t.Helper()
	all := map[string]Kind{}
	for _, file := range goFiles(t, ".") {
		ast.Inspect(file, func(n ast.Node) bool {
			spec, ok := n.(*ast.ValueSpec)
			if !ok {
				return true
			}
			if of, ok := spec.Type.(*ast.Ident); !ok || of.Name != "Kind" {
				return true
			}
			for i, name := range spec.Names {
				text, err := strconv.Unquote(spec.Values[i].(*ast.BasicLit).Value)
				if err != nil {
					t.Fatal(err)
				}
				all[name.Name] = Kind(text)
			}
			return true
		})
	}
	return all
}

// goFiles parses the Go files below a folder, except tests.
func goFiles(t *testing.T, folder string) map[string]*ast.File {
	t.Helper()
	files := map[string]*ast.File{}
	err := filepath.WalkDir(folder, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		files[path], err = parser.ParseFile(token.NewFileSet(), path, text, parser.SkipObjectResolution)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// names reports whether a file of another package refers to one of the kinds.
func names(file *ast.File, kinds []string) (found bool) {
	ast.Inspect(file, func(n ast.Node) bool {
		if s, ok := n.(*ast.SelectorExpr); ok && slices.Contains(kinds, s.Sel.Name) {
			of, ok := s.X.(*ast.Ident)
			found = found || ok && of.Name == "probe"
		}
		return !found
	})
	return found
}
