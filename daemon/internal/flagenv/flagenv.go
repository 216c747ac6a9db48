// Package flagenv sets command-line flags from environment variables: --log-level from PROBELET_LOG_LEVEL.
package flagenv

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/pflag"
)

const prefix = "PROBELET_"

// Variable returns the name of the environment variable that sets a flag.
func Variable(flag string) string {
	return prefix + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// Apply sets the flags that were not given on the command line and whose variables are set. With names it is limited to those
// flags; names that the set does not have are ignored. The error names each variable whose value is invalid.
func Apply(flags *pflag.FlagSet, names ...string) error {
	var errs []error
	flags.VisitAll(func(f *pflag.Flag) {
		value, ok := os.LookupEnv(Variable(f.Name))
		if !ok || f.Changed || len(names) > 0 && !slices.Contains(names, f.Name) {
			return
		}
		if err := flags.Set(f.Name, value); err != nil {
			errs = append(errs, fmt.Errorf("$%s: %w", Variable(f.Name), Reword(err)))
		}
	})
	return errors.Join(errs...)
}

// Unknown returns the names of variables that have the prefix but match no flag. They deserve a warning, not an error: Kubernetes
// sets PROBELET_SERVICE_HOST and the like for a Service named probelet.
func Unknown(flags *pflag.FlagSet, environ []string) (names []string) {
	known := map[string]bool{}
	flags.VisitAll(func(f *pflag.Flag) { known[Variable(f.Name)] = true })
	for _, variable := range environ {
		if name, _, _ := strings.Cut(variable, "="); strings.HasPrefix(name, prefix) && !known[name] {
			names = append(names, name)
		}
	}
	return names
}
